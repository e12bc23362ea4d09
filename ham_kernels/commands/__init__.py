"""What the command line does, as functions: train, resume, evaluate_run, sweep; and load_model for what they leave."""
