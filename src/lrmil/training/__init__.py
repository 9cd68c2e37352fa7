"""Training: patient-grouped folds and seeds, the one loop, and the stages. Import the modules; this file stays light."""
