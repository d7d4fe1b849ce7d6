"""Data: strict reading of files (``reading``), tokenised splits (``corpus``), batches
(``batches``), and what is kept between runs (``cache``)."""
