"""Operations with a reference; models call these and nothing else that depends on a kernel."""
