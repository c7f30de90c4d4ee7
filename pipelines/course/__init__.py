"""The course: exercises with checks."""
