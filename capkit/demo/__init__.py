"""The demo model: its checkpoint and clips, and how it was made and is judged (notebook 07)."""
