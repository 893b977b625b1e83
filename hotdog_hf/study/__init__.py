"""The chapter as a study of many runs."""
