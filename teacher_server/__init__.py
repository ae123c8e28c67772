"""The teacher server: scores token sequences with a served model (`stillhouse.v1.TeacherService`)."""
