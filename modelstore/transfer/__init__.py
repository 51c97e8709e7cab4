"""Training that wins back what a smaller model lost: distillation from a teacher, or plain fine-tuning."""
