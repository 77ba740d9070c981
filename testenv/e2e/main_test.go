package e2e

import (
	"bytes"
	"debug/elf"
	"fmt"
	"io/fs"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// NFTRACE_BACKEND=kprobe runs all tests with nftrace --backend kprobe. NFTRACE_NO_BTF names modules,
// separated by commas, that have no type information in this boot, or is "all".
func TestMain(m *testing.M) {
	if modules := os.Getenv("NFTRACE_NO_BTF"); modules != "" && os.Getenv("NFTRACE_IN_VM") == "1" {
		if err := dropBTF("/lib/modules", modules); err != nil {
			log.Fatal(err)
		}
	}
	dir := ""
	if b := os.Getenv("NFTRACE_BACKEND"); b != "" {
		var err error
		if dir, err = wrapNftrace(b); err != nil {
			log.Fatal(err)
		}
	}
	code := m.Run()
	if dir != "" {
		os.RemoveAll(dir)
	}
	os.Exit(code)
}

// dropBTF takes from modules below a directory what the kernel would know their type information by.
// They must not be loaded yet.
func dropBTF(dir, modules string) error {
	names := map[string]bool{}
	for _, m := range strings.Split(modules, ",") {
		names[m+".ko"] = true
	}
	dropped := 0
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || filepath.Ext(path) != ".ko" || modules != "all" && !names[e.Name()] {
			return err
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		f, err := elf.NewFile(bytes.NewReader(data))
		if err != nil {
			return err
		}
		// Its section gets a name that means nothing.
		s := f.Section(".shstrtab")
		if s == nil {
			return fmt.Errorf("%s: no names of sections", path)
		}
		section := data[s.Offset:][:s.Size]
		if i := bytes.Index(section, []byte("\x00.BTF\x00")); i >= 0 {
			section[i+1] = '-'
			dropped++
		}
		// The signature does not fit any more; one without is taken.
		data = bytes.TrimSuffix(data, []byte("~Module signature appended~\n"))
		return os.WriteFile(path, data, 0o644)
	})
	if err == nil && (dropped == 0 || modules != "all" && dropped != len(names)) {
		err = fmt.Errorf("type information of %s: dropped that of %d", modules, dropped)
	}
	return err
}

// wrapNftrace puts a script in the place of nftrace in PATH.
func wrapNftrace(backend string) (dir string, err error) {
	nftrace, err := exec.LookPath("nftrace")
	if err != nil {
		return "", err
	}
	if dir, err = os.MkdirTemp("", "backend"); err != nil {
		return "", err
	}
	script := fmt.Sprintf("#!/bin/sh\nexec %s --backend %s \"$@\"\n", nftrace, backend)
	if err := os.WriteFile(filepath.Join(dir, "nftrace"), []byte(script), 0o755); err != nil {
		return "", err
	}
	return dir, os.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}
