package filter

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"unsafe"
)

// The parser of the probes, compiled for this machine, finds in every packet what
// ParsePacket does.
func TestProbesParse(t *testing.T) {
	clang, err := exec.LookPath("clang-19")
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skipf("%v (make setup installs it)", err)
	}
	// Read here, too, so that go test does not take a result from before they changed.
	for _, file := range []string{"../../bpf/tuple.h", "testdata/tuple.c"} {
		if _, err := os.ReadFile(file); err != nil {
			t.Fatal(err)
		}
	}
	parser := filepath.Join(t.TempDir(), "parser")
	if out, err := exec.Command(clang, "-O1", "-g", "-Wall", "-Werror", "-fsanitize=undefined", "-fno-sanitize=alignment", "-fsanitize-trap=undefined",
		"-I../../bpf", "-o", parser, "testdata/tuple.c").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}

	r := rand.New(rand.NewPCG(4, 7))
	packets := append(handMade(), truncated()...)
	for range 20011 {
		packets = append(packets, generate(r))
	}
	var in bytes.Buffer
	n := 0
	for _, f := range packets {
		if !atHook(f) {
			continue
		}
		packets[n] = f
		n++
		binary.Write(&in, binary.NativeEndian, uint32(len(f)))
		in.Write(f)
	}
	packets = packets[:n]
	if n < 10007 {
		t.Errorf("only %d packets", n)
	}
	cmd := exec.Command(parser)
	cmd.Stdin, cmd.Stderr = &in, os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	const size = int(unsafe.Sizeof(Tuple{}))
	if len(out) != n*size {
		t.Fatalf("%d bytes for %d packets of %d", len(out), n, size)
	}
	differ := 0
	for i, f := range packets {
		var got Tuple
		copy(unsafe.Slice((*byte)(unsafe.Pointer(&got)), size), out[i*size:])
		if want := ParsePacket(f); got != want && differ < 10 {
			differ++
			t.Errorf("%x:\ngot  %+v\nwant %+v", f, got, want)
		}
	}
}

// atHook tells whether a frame comes to a hook like that: with no second tag, nor one that
// the kernel leaves in the packet, and with a whole network header in its first part.
func atHook(f []byte) bool {
	if len(f) < 18 {
		return false
	}
	typ, l3 := binary.BigEndian.Uint16(f[12:]), f[14:]
	if typ == ether8021Q || typ == ether8021AD {
		typ, l3 = binary.BigEndian.Uint16(l3[2:]), l3[4:]
	}
	switch typ {
	case ether8021Q, ether8021AD, etherQinQ:
		return false
	case etherARP, etherRARP:
		return len(l3) >= 28
	case etherIPv6:
		return len(l3) >= 40
	}
	return len(l3) >= 20
}
