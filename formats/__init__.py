"""File formats: one file each. `SPEC.md` beside this file describes `.sdelta`."""
