"""A run: its directory (``context``), what each student learns from whom (``lessons``), the stages
from prototypes to scores (``stages``, kept by ``store``, which ``published`` compares), frozen
teachers and what they said (``serving``, ``teacher_cache``), methods side by side (``compare``,
``table``)."""
