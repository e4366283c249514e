"""What is said, by whom, and how: plan, voices, recordings and codes."""
