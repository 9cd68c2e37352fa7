"""Cohorts: the checked table of slides and labels, and cohorts to try things on. Import the modules, not this."""
