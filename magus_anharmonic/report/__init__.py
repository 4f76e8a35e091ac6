"""From stored numbers to sentences, tables and pictures."""
