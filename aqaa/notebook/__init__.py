"""What the notebooks draw and play with: `show` (figures, players) and `widgets` (interactive).

Import those two. May import everything but the command line; nothing else imports it."""
