"""Code that checks answers: functions of an answer and a reference, to be declared as rewards as they are."""
