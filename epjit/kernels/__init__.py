"""What is compiled, for which shape and GPU: configs, choices, variants. Launches nothing."""
