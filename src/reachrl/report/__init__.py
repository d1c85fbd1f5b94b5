"""What people look at: the report and the other pages, their plots, and the videos of episodes."""
