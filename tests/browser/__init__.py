"""A real JupyterLab in a real browser, for test_browser."""
