"""How well emoji are drawn: by stage and by kind of emoji, and for words that people type."""
