"""Label tables of the paper's cohorts, made from the files that their portals offer. Import the modules, not this."""
