"""Data: strict reading of files (``reading``), tokenised splits (``corpus``), batches
(``batches``), what is kept between runs (``cache``) and how files are compared (``digests``)."""
