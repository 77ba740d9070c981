// Nolines takes the lines of source out of BPF objects, which clang says whenever it says types. To
// parse them is a good part of what it takes to start, and nobody reads them but in a verifier's log.
package main

import (
	"debug/elf"
	"encoding/binary"
	"fmt"
	"os"
)

func main() {
	for _, name := range os.Args[1:] {
		if err := strip(name); err != nil {
			fmt.Fprintf(os.Stderr, "nolines: %s: %v\n", name, err)
			os.Exit(1)
		}
	}
}

// strip empties the line information in section .BTF.ext (struct btf_ext_header of libbpf): what is left
// is the size that a record would have.
func strip(name string) error {
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	obj, err := elf.NewFile(f)
	if err != nil {
		return err
	}
	ext := obj.Section(".BTF.ext")
	if ext == nil {
		return fmt.Errorf("no section .BTF.ext")
	}
	// magic, version, flags; then lengths and offsets behind the header.
	var header struct {
		Magic                         uint16
		Version, Flags                uint8
		Len, FuncOff, FuncLen         uint32
		LineOff, LineLen, RelOff, Rel uint32
	}
	if err := binary.Read(ext.Open(), obj.ByteOrder, &header); err != nil {
		return err
	}
	const size = 4
	if header.LineLen < size {
		return fmt.Errorf("no lines")
	}
	at := int64(ext.Offset) + int64(header.Len) + int64(header.LineOff)
	if _, err := f.WriteAt(make([]byte, header.LineLen-size), at+size); err != nil {
		return err
	}
	header.LineLen = size
	data, err := binary.Append(nil, obj.ByteOrder, &header)
	if err == nil {
		_, err = f.WriteAt(data, int64(ext.Offset))
	}
	if err != nil {
		return err
	}
	return f.Close()
}
