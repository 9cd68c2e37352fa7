"""`lrmil bench`: how fast slides are read and answered on this machine, as ratios taken in one run."""
