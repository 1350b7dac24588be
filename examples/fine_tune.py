"""Fine-tune a model in 4 bits from an adapter that makes up for its quantization.

    python examples/fine_tune.py HuggingFaceTB/SmolLM2-135M text.txt tuned

The arguments are a causal language model in full precision, a text file with blank lines between its documents, and the
folder that the trained adapter is written to.
"""

import sys
from pathlib import Path

from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import quailora

name, text, out = sys.argv[1:4]

# The model in 4 bits with a LoRA adapter, as for QLoRA.
four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
quantized = AutoModelForCausalLM.from_pretrained(name, quantization_config=four_bits)
config = LoraConfig(r=32, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(quantized, config)

# Batches of the text that the model is trained on; the collator pads them and gives padding the label -100.
tokenizer = AutoTokenizer.from_pretrained(name)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
documents = Path(text).read_text(encoding="utf-8").split("\n\n")
rows = [tokenizer(document, truncation=True, max_length=256) for document in documents if document.strip()]
collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)

# The one line more than for QLoRA. 16 directions make up for the quantization and stay as they are, and 16 are trained.
batches = DataLoader(rows, batch_size=4, collate_fn=collator)
report = quailora.initialize(model, batches, weights=name, frozen_rank=16)
print(f"Before training, {report['mean_error_share']['error']:.0%} of the output error of quantization is left.")

arguments = TrainingArguments(out, per_device_train_batch_size=4, max_steps=20, learning_rate=1e-4, report_to=[])
trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator)
trainer.train()
model.save_pretrained(out)
print(f"quailora check {out} --base {name}  # says whether the adapter belongs on this base")
