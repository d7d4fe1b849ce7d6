"""Meta-KD itself: prototypes, meta-teacher, students and the distillation objective.

Source: Pan et al., *Meta-KD: A Meta Knowledge Distillation Framework for Language Model Compression
across Domains*, ACL 2021, arXiv 2012.01266. ``docs/method.md`` lists every equation with the test
that pins it.
"""
