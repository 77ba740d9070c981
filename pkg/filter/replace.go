package filter

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf/asm"
)

// Replace returns a copy of a program in which body stands in place of the
// BPF-to-BPF function symbol. insns are as an ebpf.ProgramSpec has them: every
// function begins with an instruction that has its symbol, and calls are
// references not yet resolved to offsets. The first instruction of body takes
// over the symbol, the BTF of the function and the source line of the
// instruction it replaces, which the kernel wants of every function; so body
// must have the signature of the old function.
//
// The C function should be static, so that the verifier follows the call and
// knows the pointer, and must keep the compiler from looking through it, or
// else stores to the tuple may be dropped. It must not touch a struct that is
// relocated (preserve_access_index): a relocation of its first instruction
// would be applied to that of body.
//
//	static __attribute__((noinline)) int filter_match(struct pkt_tuple *t)
//	{
//		int match = 1;
//		asm volatile("" : "+r"(match) : "r"(t) : "memory");
//		return match;
//	}
//
// It fails if there is no such function, or if insns or body are not of that form.
func Replace(insns asm.Instructions, symbol string, body asm.Instructions) (asm.Instructions, error) {
	if symbol == "" || len(body) == 0 {
		return nil, errors.New("filter: replacing needs the name of a function and a body for it")
	}
	start, end := -1, len(insns)
	for i, ins := range insns {
		switch {
		case ins.Symbol() == symbol && start < 0:
			start = i
		case ins.Symbol() != "" && start >= 0:
			end = min(end, i)
		}
		if ins.IsFunctionReference() && ins.Constant != -1 {
			return nil, fmt.Errorf("filter: the call at instruction %d is resolved already: replace before the program is loaded", i)
		}
	}
	if start < 0 {
		return nil, fmt.Errorf("filter: the program has no function %q: it may be unused or inlined (it must be noinline and called)", symbol)
	}
	if last := insns[end-1].OpCode.JumpOp(); last != asm.Exit && last != asm.Ja {
		return nil, fmt.Errorf("filter: function %q does not end before the symbol %q", symbol, insns[end].Symbol())
	}

	replaced := make(asm.Instructions, 0, len(insns)-(end-start)+len(body))
	replaced = append(replaced, insns[:start]...)
	replaced = append(replaced, body...)
	replaced = append(replaced, insns[end:]...)
	// The reference, to a map for example, belongs to the old instruction.
	replaced[start].Metadata = insns[start].WithReference("").Metadata
	return replaced, nil
}
