"use strict";
// SentencePiece's BPE (bpe_model.cc), as moe/data/tokenizer.py calls it: text → ids.

const SPACE = "\u2581";  // SentencePiece's symbol for a space

class Tokenizer {
  // vocabulary: { pieces: [...], kinds: a letter per id } (moe/playground/supported.py).
  constructor(vocabulary) {
    this.pieces = vocabulary.pieces;
    this.kinds = vocabulary.kinds;
    this.bos = vocabulary.bos;
    this.ids = new Map();   // normal and user-defined piece → id; pairs with a lower id are merged first
    this.bytes = new Map(); // byte → id
    this.whole = [];        // user-defined pieces, longest first: found before anything else and never merged
    this.longest = 1;       // characters of the longest piece
    this.pieces.forEach((piece, id) => {
      const kind = this.kinds[id];
      if (kind === "b") this.bytes.set(parseInt(piece.slice(3, 5), 16), id);
      if (kind === "n" || kind === "u") {
        this.ids.set(piece, id);
        this.longest = Math.max(this.longest, piece.length);
      }
      if (kind === "u") this.whole.push(piece);
    });
    this.whole.sort((a, b) => b.length - a.length);
  }

  encode(text) {
    const ids = [];
    // The symbol itself would be read as a space, so it is encoded as bytes.
    text.split(SPACE).forEach((part, number) => {
      if (number) this.pushBytes(SPACE, ids);
      this.encodePart(part.replaceAll(" ", SPACE), ids);
    });
    return ids;
  }

  pushBytes(text, ids) {
    for (const byte of new TextEncoder().encode(text)) ids.push(this.bytes.get(byte));
  }

  encodePart(text, ids) {
    const { symbols, frozen } = this.split(text);
    // pairs[i]: id of symbols i and i + 1 as one piece, or Infinity.
    const pair = i => i + 1 < symbols.length && !frozen[i] && !frozen[i + 1]
      ? this.ids.get(symbols[i] + symbols[i + 1]) ?? Infinity : Infinity;
    const pairs = symbols.map((_, i) => pair(i));
    for (;;) {
      let best = 0;
      for (let i = 1; i < pairs.length; i++) if (pairs[i] < pairs[best]) best = i;
      if (!(pairs[best] < Infinity)) break;
      symbols.splice(best, 2, symbols[best] + symbols[best + 1]);
      frozen.splice(best, 1);
      pairs.splice(best, 1);
      pairs[best] = pair(best);
      if (best > 0) pairs[best - 1] = pair(best - 1);
    }
    for (const symbol of symbols) {
      const id = this.ids.get(symbol);
      if (id === undefined) this.pushBytes(symbol, ids); else ids.push(id);
    }
  }

  // Characters, and user-defined pieces as one symbol each.
  split(text) {
    const symbols = [], frozen = [];
    for (let at = 0; at < text.length;) {
      const piece = this.whole.find(candidate => text.startsWith(candidate, at));
      symbols.push(piece ?? String.fromCodePoint(text.codePointAt(at)));
      frozen.push(piece !== undefined);
      at += symbols.at(-1).length;
    }
    return { symbols, frozen };
  }

  // Text of an id; a byte of a character as ⟨E2⟩, an id without a piece as its number.
  show(id) {
    const kind = this.kinds[id];
    if (kind === undefined) return `⟨${id}⟩`;
    if (kind === "b") return `⟨${this.pieces[id].slice(3, 5)}⟩`;
    return kind === "c" ? `⟨${this.pieces[id].replace(/[<>]/g, "")}⟩` : this.pieces[id].replaceAll(SPACE, " ");
  }
}
