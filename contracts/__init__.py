"""Hold every document and format that crosses a process boundary; standard library only."""
