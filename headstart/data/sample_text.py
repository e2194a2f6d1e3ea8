"""A short text of English, dialogue and code, on which the loss of quantizing is measured."""

SAMPLE_TEXT = '''\
The lighthouse on the northern cape was built in 1871, after three ships had been lost on the same reef in a single \
winter. Its first keeper was a retired carpenter who had never been to sea. He kept a diary of the weather, of the \
birds that struck the glass on foggy nights, and of the price of oil, which he thought too high. When the lamp was \
replaced by an electric one, his granddaughter gave the diary to the town library, where it is still read by people \
who study how the climate of the coast has changed. The average temperature in March, for example, is now almost two \
degrees higher than in the first ten years of his notes.

"Did you remember to close the window?" asked Anna.
"I think so," said her brother, "but the kitchen was already full of smoke, so I left in a hurry."
"Then we should go back. If it rains tonight, the books on the table will be ruined."
They turned around at the bakery and walked up the hill again. It was getting dark, and the first drops fell.

Question: A train leaves at 9:40 and arrives at 12:05. It stops three times for five minutes each. How long is it \
moving?
Answer: The journey takes 2 hours and 25 minutes, which is 145 minutes. The stops take 3 x 5 = 15 minutes. So the \
train is moving for 145 - 15 = 130 minutes, or 2 hours and 10 minutes.

def count_words(path, least=2):
    """Return the words of a file that occur at least `least` times, the most frequent ones first."""
    counts = {}
    with open(path, encoding="utf-8") as file:
        for line in file:
            for word in line.lower().split():
                word = word.strip(".,;:!?()")
                if word:
                    counts[word] = counts.get(word, 0) + 1
    kept = [(word, count) for word, count in counts.items() if count >= least]
    return sorted(kept, key=lambda pair: (-pair[1], pair[0]))


class Queue:
    def __init__(self, size):
        self.items, self.size = [], size

    def push(self, item):
        if len(self.items) == self.size:
            raise OverflowError("the queue is full")
        self.items.append(item)

    def pop(self):
        return self.items.pop(0)
'''
