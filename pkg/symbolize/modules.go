package symbolize

import (
	"bufio"
	"bytes"
	"errors"
	"os"
	"path/filepath"
)

// hasModule tells whether the kernel has a module, loaded or built in. One that it has not it may
// load, or make tables, for whoever asks it for what the module does.
func (s *System) hasModule(name string) bool {
	if s.loaded(name) || s.BuiltIn != nil && s.BuiltIn(name) {
		return true
	}
	// What is built in does not change.
	s.builtInOnce.Do(func() { s.builtIn = builtInBySymbols(filepath.Join(s.Proc, "kallsyms")) })
	return s.builtIn[name]
}

// wouldLoad tells whether the kernel could load a module for whoever asks for what it does.
func (s *System) wouldLoad(name string) bool {
	if _, err := os.Stat(filepath.Join(s.Proc, "modules")); errors.Is(err, os.ErrNotExist) {
		return false // it has been built without modules
	}
	return !s.hasModule(name)
}

// loaded tells whether a module is among those that were loaded.
func (s *System) loaded(name string) (found bool) {
	eachLine(filepath.Join(s.Proc, "modules"), func(line []byte) {
		found = found || bytes.HasPrefix(line, []byte(name+" "))
	})
	return found
}

// builtInBySymbols reads the names of the modules that are built in from a file like
// /proc/kallsyms: each has a call at boot that is named after it (include/linux/init.h:__initcall_id,
// since Linux 5.12), which the kernel knows if it has the names of data (CONFIG_KALLSYMS_ALL).
func builtInBySymbols(path string) map[string]bool {
	builtIn := map[string]bool{}
	eachLine(path, func(line []byte) {
		// ffffffff8cf7371c d __initcall__kmod_virtio_pci__580_823_virtio_pci_driver_init6
		_, call, ok := bytes.Cut(line, []byte(" __initcall__kmod_"))
		switch {
		case ok:
			name, _, _ := bytes.Cut(call, []byte("__"))
			builtIn[string(name)] = true
		case bytes.HasSuffix(line, []byte(" nft_do_chain")): // behind a module's is its name
			builtIn["nf_tables"] = true
		}
	})
	return builtIn
}

// eachLine calls f with each line of a file; one that cannot be read has none.
func eachLine(path string, f func(line []byte)) {
	file, err := os.Open(path)
	if err != nil {
		return
	}
	defer file.Close()
	for lines := bufio.NewScanner(file); lines.Scan(); {
		f(lines.Bytes())
	}
}
