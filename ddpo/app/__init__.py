"""The app: look at runs, compare, draw, vote, score. One page, a file a tab; only here: gradio."""
