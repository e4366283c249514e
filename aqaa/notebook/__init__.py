"""What the notebooks draw and play with: `show` (static figures and players) and `widgets` (interactive)."""
