"""The course: exercises with checks, and projects that can be graded."""
