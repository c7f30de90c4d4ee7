"""Students' projects: a folder to begin with, a check against the rubric, and a page for the teacher."""
