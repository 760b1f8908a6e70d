"""The search itself: state, decisions and answers, without any engine."""
