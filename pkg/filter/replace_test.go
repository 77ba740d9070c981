package filter

import (
	"bytes"
	"encoding/binary"
	"reflect"
	"strings"
	"testing"

	"github.com/cilium/ebpf/asm"
)

type line string

func (l line) String() string { return string(l) }

// program is a main function that calls filter_match and then other.
func program() asm.Instructions {
	return asm.Instructions{
		asm.Mov.Reg(asm.R1, asm.R10).WithSymbol("prog").WithSource(line("prog {")),
		asm.Add.Imm(asm.R1, -72),
		asm.Call.Label("filter_match"),
		asm.Call.Label("other"),
		asm.Return(),
		asm.LoadMapPtr(asm.R0, 0).WithReference("some_map").WithSymbol("filter_match").WithSource(line("filter_match {")),
		asm.Mov.Imm(asm.R0, 1).WithSource(line("return 1;")),
		asm.Return(),
		asm.Mov.Imm(asm.R0, 7).WithSymbol("other").WithSource(line("other {")),
		asm.Return(),
	}
}

func TestReplace(t *testing.T) {
	before := program()
	e, err := Parse("tcp port 80")
	if err != nil {
		t.Fatal(err)
	}
	body := e.Instructions()
	got, err := Replace(before, "filter_match", body)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(before, program()) || !reflect.DeepEqual(body, e.Instructions()) {
		t.Error("Replace has changed its arguments")
	}
	offsets, err := got.SymbolOffsets()
	if err != nil {
		t.Fatal(err)
	}
	if want := map[string]int{"prog": 0, "filter_match": 5, "other": 5 + len(body)}; !reflect.DeepEqual(offsets, want) {
		t.Errorf("functions are at %v, want %v", offsets, want)
	}
	first := got[5]
	if first.Source() != line("filter_match {") || first.Reference() != "" {
		t.Errorf("the first instruction has source %v and reference %q", first.Source(), first.Reference())
	}
	var raw bytes.Buffer
	if err := got.Marshal(&raw, binary.LittleEndian); err != nil {
		t.Fatal(err)
	}
	if got[2].Constant != 2 || got[3].Constant != int64(1+len(body)) {
		t.Errorf("calls go %d and %d instructions ahead", got[2].Constant, got[3].Constant)
	}

	// A second filter takes the place of the first.
	fresh, err := Replace(program(), "filter_match", body)
	if err != nil {
		t.Fatal(err)
	}
	blank := asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()}
	fresh, err = Replace(fresh, "filter_match", blank)
	if err != nil || len(fresh) != 9 || fresh[5].Symbol() != "filter_match" {
		t.Errorf("replaced twice: %v\n%v", err, fresh)
	}

	// The last function, and the program itself.
	for symbol, want := range map[string]int{"other": 10, "prog": 7} {
		got, err := Replace(program(), symbol, blank)
		if err != nil || len(got) != want {
			t.Errorf("replacing %s: %v\n%v", symbol, err, got)
		}
	}
}

func TestReplaceErrors(t *testing.T) {
	blank := asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()}
	resolved := program()
	if err := resolved.Marshal(new(bytes.Buffer), binary.LittleEndian); err != nil {
		t.Fatal(err)
	}
	label := program()
	label[6] = label[6].WithSymbol("label")
	for name, test := range map[string]struct {
		insns  asm.Instructions
		symbol string
		body   asm.Instructions
		want   string
	}{
		"no body":         {program(), "filter_match", nil, "a body for it"},
		"no symbol":       {program(), "", blank, "the name of a function"},
		"no function":     {program(), "nosuch", blank, `has no function "nosuch"`},
		"resolved calls":  {resolved, "filter_match", blank, "resolved already"},
		"a label in it":   {label, "filter_match", blank, `does not end before the symbol "label"`},
		"an empty stream": {nil, "filter_match", blank, "has no function"},
	} {
		if _, err := Replace(test.insns, test.symbol, test.body); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: error %v, want %q", name, err, test.want)
		}
	}
}
