"""The terminal chat: reads lines and commands, shows answers, keeps chats."""
