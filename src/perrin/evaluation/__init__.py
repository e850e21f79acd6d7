"""What a run is judged by: plots, baselines, and the folders of its samples."""
