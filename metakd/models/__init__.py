"""Encoders, whatever the method: loaded without trust (``sources``), tapped for what they compute
(``taps``), run on real tokens only (``packing``), shortened to students (``student``)."""
