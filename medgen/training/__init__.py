"""The one training loop: players, moving averages, early stopping, and a state that resumes exactly."""
