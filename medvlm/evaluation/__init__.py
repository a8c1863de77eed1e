"""Predictions, named score rules and the leaderboard."""
