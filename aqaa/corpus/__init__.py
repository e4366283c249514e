"""What is said, by whom, and how: facts, plan, voices, recordings, codes and dialogues.

Import its modules. May import weights and what lies below; evaluation and training import it."""
