"""What notebooks draw and play with: `show` (figures and players), `widgets` (interactive)."""
