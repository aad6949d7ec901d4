# What agents' frameworks call roles that a model knows by other names.
ROLES = {"developer": "system", "function": "tool", "chatbot": "assistant", "model": "assistant"}
