"""From a cohort to a deployed model: one file a stage, every stage resumable; `run.run_all` does them in order."""
