"""The methods: a table of them (``methods``) and what it is made of: ``terms`` of objectives,
``kinds`` of teachers; and Meta-KD's own parts, prototypes, meta-teacher and objective.

Source: Pan et al., *Meta-KD: A Meta Knowledge Distillation Framework for Language Model Compression
across Domains*, ACL 2021, arXiv 2012.01266. ``docs/method.md`` lists every equation with the test
that pins it.
"""
