"""The built-in world: scenes, clips, and where the tiny weights come from."""
