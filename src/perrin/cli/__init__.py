"""The command line: ``perrin train | sample | likelihood | inspect | demo``."""
