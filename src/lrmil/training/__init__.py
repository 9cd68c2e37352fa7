"""Training: patient-grouped folds, seeds, the one loop, and the stages. Import the modules; this file stays light."""
