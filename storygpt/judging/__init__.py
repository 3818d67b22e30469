"""How generated stories read beside held-out ones."""
