"""How results look: self-contained HTML pages, inline views for notebooks, text tables for the terminal."""
