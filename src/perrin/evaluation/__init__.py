"""Looking at what training reached: baselines and plots."""
